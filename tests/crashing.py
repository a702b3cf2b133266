"""An analysis that ends the process which loads it."""

import os

os._exit(7)
