"""``python -m albireo`` is the ``albireo`` command."""

import sys

from albireo.cli.main import main

sys.exit(main())
