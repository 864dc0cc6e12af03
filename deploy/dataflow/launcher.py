"""What Dataflow starts in the image to launch the flex template; see deploy/dataflow.md."""

import sys

from foldfeed.pipelines.template import main

if __name__ == "__main__":
    sys.exit(main())
