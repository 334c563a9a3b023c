from __future__ import annotations
import time
from .federations import *

def test_whole(coordinator: Coordinator, lead: Hand) -> None:
    t=time.time()
    a=coordinator.site("a"); b=coordinator.site("b"); c=coordinator.site("c")
    print("sites",time.time()-t)
    run=lead.submit(lead.job(rounds=2,sites=["a","b","c"]))
    print("submitted",time.time()-t)
    r=lead.wait(run); print("done",time.time()-t)
    print(r["history"], a.trained)
    print([m.WhichOneof("body") for m in a.stay.messages])
    for e in coordinator.audit(): print(e)
