"""`python -m trainer.report RUN [RUN …]`."""

import sys

from trainer.report import main

sys.exit(main())
