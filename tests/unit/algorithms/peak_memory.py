"""The most memory that a call holds at once, from torch's own record of every allocation."""

import json

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call, folder):
    """Peak of the CPU memory that `call` allocates, in bytes; what is freed counts no more."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    path = folder / "trace.json"
    recorded.export_chrome_trace(str(path))
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
