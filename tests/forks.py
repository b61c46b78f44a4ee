"""Runs Python programs with torch already imported: a server process imports it once and forks for each program."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Each program runs in a child process, so a crash does not end the server.
SERVER = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.clear()
        os.environ.update(task["environment"])
        sys.path.insert(0, task["environment"].get("PYTHONPATH", ""))
        sys.argv[1:] = task["arguments"]
        sys.dont_write_bytecode = True
        for descriptor in (1, 2):
            os.dup2(os.open(f"{task['folder']}/{descriptor}", os.O_WRONLY | os.O_CREAT), descriptor)
        try:
            exec(task["code"], {"__name__": "__main__"})
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """``forks.run(code, *arguments, **environment)`` works like subprocess.run of ``python -c``, in a given folder."""

    def __init__(self, cwd="/"):
        command = [sys.executable, "-c", SERVER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=cwd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, code, *arguments, inherited=os.environ, **environment):
        with tempfile.TemporaryDirectory() as folder:
            environment = {**inherited, **environment}
            task = {"code": code, "arguments": arguments, "environment": environment, "folder": folder}
            print(json.dumps(task), file=self.process.stdin, flush=True)
            status = int(self.process.stdout.readline())
            out, err = ((Path(folder) / name).read_text() for name in "12")
        return subprocess.CompletedProcess(code, status, out, err)
