"""``python -m alignjax`` is the ``alignjax`` command."""

import sys

from alignjax.run import main

if __name__ == "__main__":
    sys.exit(main())
