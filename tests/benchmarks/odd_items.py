"""Items that fail, crash and hang, for the test of what runs them; imports nothing that takes long."""

import os
import subprocess
import sys
import time


def falls(context):
    raise ValueError("planted")


def crashes(context):
    os._exit(7)


def hangs(context):
    """With a process of its own, which hangs too."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    context.tell({"child": child.pid})
    time.sleep(600)


def answers(context):
    return {"pid": os.getpid()}
