"""Verifiers that misbehave on demand: the completion text says how."""

import ctypes
import os
import time

from pear_ray.records import Problem


def obey(problem: Problem, completion_text: str) -> dict[str, object] | None:
    """Correct, with the text as a number, unless the text asks for trouble."""
    if completion_text == "hang":
        while True:
            time.sleep(1)
    if completion_text == "segfault":
        ctypes.string_at(0)
    if completion_text == "exit":
        os._exit(3)
    if completion_text == "raise":
        raise ValueError(f"no reading of {problem.problem_id}")
    if completion_text == "print":
        print('["ok", 77.0, ""]')
        completion_text = "5"
    if completion_text == "memory":
        bytearray(64 << 30)
    if completion_text == "none":
        return None
    if completion_text == "pid":
        completion_text = str(os.getpid())
    return {"value": float(completion_text), "correct": True}


def take(problem: Problem, completion_text: str, mib: int) -> bool:
    """True once that much memory could be had."""
    return len(bytearray(mib << 20)) > 0
