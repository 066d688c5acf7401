"""Python imports this at its start where this folder is on PYTHONPATH: no connection to another host than this one.

Whoever tries gets an error, as on a machine without internet, and a line in the file EDITLOSS_CONNECTIONS: the host and
the files on the stack.
"""

import json
import os
import socket
import traceback

LOCAL = {"localhost", "127.0.0.1", "0.0.0.0", "::1", "::", "", None}


def _check(host):
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host in LOCAL:
        return
    stack = [frame.filename for frame in traceback.extract_stack()]
    with open(os.environ["EDITLOSS_CONNECTIONS"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"host": str(host), "stack": stack}) + "\n")
    raise ConnectionRefusedError(f"the tests allow no connection to {host}")


def _guarded(method):
    def call(self, address, *rest):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check(address[0])
        return method(self, address, *rest)

    return call


def _looked_up(method):
    def call(host, *rest, **more):
        _check(host)
        return method(host, *rest, **more)

    return call


socket.socket.connect = _guarded(socket.socket.connect)
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)
socket.getaddrinfo = _looked_up(socket.getaddrinfo)
