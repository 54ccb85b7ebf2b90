"""Transfers: blobs from their sources into the store, resumable, verified and committed in groups.

``Fetcher`` serves a list of ``BlobRequest``. For each that is not found on this disk it runs a ``Download``: the threads
and files around a ``Scheduler``, which decides without I/O. ``GroupCommit`` makes blobs of what is complete. ``Prefetcher``
fetches files whose digest is not known yet. The rest of this text is about threads, locks, and which thread owns what.

Threads
    coordinator     the thread that runs ``Fetcher.obtain_all``, one of a ``WorkerPool``; it runs ``Download.fill``
    worker          started by ``Download`` for one connection; fetches ranges while the scheduler has any for it
    hasher          ``BackgroundHasher``, one for each download of more than a piece; reads the partial
    main            starts coordinators and calls ``Fetcher.commit_due``

A blob of one piece with one source has neither worker nor hasher: its coordinator fetches it.

Locks, outermost first; no thread takes one while it holds a later one
    blob lock               between processes; from before the partial is opened until it is committed or discarded.
                            A thread that holds one waits for none: a busy blob is left to the end, when the thread's
                            own are committed. ``Lock.progress`` is called for every buffer that arrives.
    ``GroupCommit._mutex``  the group's pending commits; also held while they are committed
    ``Download._mutex``     scheduler, failure attribution, and the tables of workers, bodies and prefixes. Held for
                            decisions, never while reading, writing or emitting an event.
    leaf locks              ``Connections``, ``FailureTable``, ``BadSources``, ``CompressedBlob`` (held while the index is
                            fetched), ``Prefetcher._mutex``: no other lock of this package is taken under them

Claims and writes
    A claim is the number of a range in flight, and the right to write its pieces. It ends at any time: ``Scheduler`` ends
    ranges that stall, are taken over or are too many. So a worker asks before each write: ``may_write`` sets
    ``Range.writing`` under the mutex, the write follows without it, then ``written`` or ``completed`` unsets it. While it
    is set, no other range can take the piece over, and nothing ends the range but its own worker. A write that raises
    leaves it set, and ends the download.

Who may access the partial
    The coordinator, the hasher, and the threads in ``Download._writers``: workers from their response (``opened``) to the
    end of the range. Before the digest is compared, and before ``fill`` returns, these are joined. Other workers are not:
    one that waits for a response may wait long, but when it comes, ``opened`` refuses it. The coordinator may close a body
    that a worker is reading, which ends the read.

Connection permits
    The caller of ``obtain_all`` has taken one permit of ``Connections`` for its thread. The first worker of a download
    uses that one; each further worker has a permit of its own, which the coordinator takes and the worker's thread
    returns when it ends. A worker whose range was taken over keeps its permit until then: its connection is still open.
    When the first worker has ended, the next one started takes its place.

Commits
    A ``PendingCommit`` is owned by the ``GroupCommit`` that it was added to, and so are its partial and its blob lock;
    before that by its coordinator. The coordinator commits a full group; the main thread commits one that has waited
    long enough, as long as no other thread is committing it. ``before_commit`` is called for each blob and may raise.

Failures and events
    ``FailureAttribution.note`` is called with the mutex held, because the order of failures decides; ``flush`` without it,
    because it writes a file and emits events. Event sinks are called from all of these threads.

Cancellation
    One token for each run, checked with every buffer and waited on instead of sleeping. A cancelled download ends its
    threads as a failed one does: pieces that are recorded are kept, a group that is not committed is dropped.
"""
