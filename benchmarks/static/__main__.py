import sys

from benchmarks.static import main

sys.exit(main())
