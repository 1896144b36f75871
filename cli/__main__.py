"""`python -m trueup.cli`: the command `trueup`, where its script is not on PATH."""

from trueup.cli import main

main(prog_name="trueup")
