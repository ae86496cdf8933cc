"""What the benchmarks are made of; the commands that run them lie beside this folder."""

import sys
from pathlib import Path

# Results name the commit of this checkout: its code is what is measured, whichever checkout is installed.
sys.path.insert(0, str(Path(__file__).parents[2]))
