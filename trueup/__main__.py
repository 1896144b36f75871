"""`python -m trueup …`: the command `trueup`, where its folder is not on PATH."""

from trueup.cli import main

if __name__ == "__main__":
    main(prog_name="python -m trueup")
