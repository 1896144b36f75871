"""`python -m trueup …` runs the command `trueup` when its folder is not on PATH."""

from trueup.cli import main

if __name__ == "__main__":
    main(prog_name="python -m trueup")
