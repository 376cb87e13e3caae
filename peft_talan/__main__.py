"""`python -m peft_talan`: the command line."""

import sys

from peft_talan_cli import main

if __name__ == "__main__":
    sys.exit(main())
