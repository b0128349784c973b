"`python -m langmlm` is the command `langmlm`."

import sys

from langmlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
