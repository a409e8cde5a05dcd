"""`ray job submit --working-dir . -- python jobs/study.py STUDY.yaml [key=value ...]`."""

import sys

from pear_ray.cli import main

sys.exit(main(["study", *sys.argv[1:]]))
