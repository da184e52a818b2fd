"`python -m tinyvllm` is the command `tinyvllm`."
import sys

from tinyvllm.cli.main import main

sys.exit(main())
