"""The sockets that launchd holds for an agent which it starts on demand.

`int launch_activate_socket(const char *name, int **fds, size_t *cnt)` of <launch.h>, macOS 10.10 and later, gives the
descriptors of an entry of the property list's Sockets, in memory that the caller frees, or returns an error number:
ENOENT where there is no such entry, ESRCH where launchd has not started the process. See launch(3) and
https://developer.apple.com/documentation/xpc/launch_activate_socket
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from typing import Any

from ..errors import DgemmaError

LIBRARY = "/usr/lib/libSystem.B.dylib"


def activated(name: str, library: Any = None) -> list[socket.socket]:
    """The listening sockets of an entry; none if the property list has no such entry.

    Args:
        name: of the entry.
        library: replacement for macOS's libSystem.

    Raises:
        DgemmaError: this process was not started by launchd, or not on macOS.
    """
    try:
        system = library or ctypes.CDLL(LIBRARY)
        activate, free = system.launch_activate_socket, system.free
    except (OSError, AttributeError) as error:
        raise DgemmaError(f"launchd's sockets are macOS's ({error}); start the server without --agent.") from None
    activate.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.POINTER(ctypes.c_int)), ctypes.POINTER(ctypes.c_size_t)]
    activate.restype, free.argtypes, free.restype = ctypes.c_int, [ctypes.c_void_p], None
    descriptors, count = ctypes.POINTER(ctypes.c_int)(), ctypes.c_size_t()
    code = activate(name.encode(), ctypes.byref(descriptors), ctypes.byref(count))
    if code == errno.ENOENT:
        return []
    if code:
        raise DgemmaError(f"launchd gives no socket {name} ({os.strerror(code)}); install the agent again.")
    found = [socket.socket(fileno=descriptors[i]) for i in range(count.value)]
    for one in found:
        one.set_inheritable(False)
    free(descriptors)
    return found
