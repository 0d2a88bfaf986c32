"""`python -m kvtc_vllm.cli`."""

import sys

from kvtc_vllm.cli import main

sys.exit(main())
