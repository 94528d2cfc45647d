"""The process that trains: `accelerate launch ... -m alignment.train STAGE_YAML`, as `alignment run` starts it, or by
hand on any cluster: `accelerate launch --config_file my.yaml -m alignment.train RECIPE --stage NAME [--set KEY=VALUE]`.
"""

from __future__ import annotations

import sys

from alignment.training.quiet import before_import

if __name__ == "__main__":
    before_import()
    from alignment.training.worker import main

    sys.exit(main(sys.argv[1:]))
