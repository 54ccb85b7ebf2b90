"""Questions about speed and memory, each asked of modelstow and of its peers side by side in one run.

``python -m benchmarks`` asks all of them. Rules that every question keeps:

* peers stand beside modelstow in the same run, and the order of contenders rotates from repeat to repeat, so that no row
  always inherits the write-back or the deletes of the one before it;
* ratios are paired within a repeat, then the median is taken; absolute figures belong to one machine and one hour;
* every repeat writes into a fresh folder and no trees are deleted before the question ends: on ext4, making files soon
  after mass deletes is up to 20 times slower. What is one large file goes after its run, and the disk is synced before
  the next, so that no row pays for another's write-back;
* a capped server pays for bytes before it sends them: a request that may begin with a burst would make ranges look fast;
* a peer that is not there prints "not available" and why, never a figure.
"""
