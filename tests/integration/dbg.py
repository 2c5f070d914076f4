import asyncio, threading, time, sys, io
import tests.integration.rater as r
from pipeline.rating import app as A
orig = A.Rater.__init__
def init(self,*a,**k):
    orig(self,*a,**k)
    def dump():
        time.sleep(float(22))
        c=self.app.consumer; t=c._thread
        print("ACTIVE",c._active_partitions,"PAUSED",c._paused_partitions,"BUF",c._buffered_partitions,"flow",c.flow_active, file=sys.stderr)
        k=t._consumer; f=k._fetcher
        print("RECORDS",{tp:repr(v) for tp,v in f._records.items()}, "pos",t._positions(k),"left",t._left, "inflight", f._in_flight,"starts",t._starts, "fetch_task", f._fetch_task, file=sys.stderr)
        for p,o in self._owners.items(): print(p,o.next_offsets,o._queued,o._full,o._held,[ (q.from_offset,q.next_offset) for q in o._queues[A.Source.EVENTS]],file=sys.stderr)
        for name,loop in (("main",self._loop),("thread",t.thread_loop)):
            for task in asyncio.all_tasks(loop):
                b=io.StringIO(); task.print_stack(file=b); print("TASK",name,b.getvalue()[-700:],file=sys.stderr)
        sys.stderr.flush()
    threading.Thread(target=dump,daemon=True).start()
A.Rater.__init__=init
r.main()
