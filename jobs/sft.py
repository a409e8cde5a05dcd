"""`ray job submit --working-dir . -- python jobs/sft.py RUN.yaml [key=value ...]`."""

import sys

from pear_ray.cli import main

sys.exit(main(["sft", *sys.argv[1:]]))
