# Type checkers find convert/ through this file in a checkout. A wheel has convert/ inside the package instead.
from convert import *  # noqa: F403
