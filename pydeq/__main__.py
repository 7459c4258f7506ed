import sys

from pydeq.cli import main

sys.exit(main())
