"""Frames ahead of time: a thread reads the clips that come next, while the card works on those before."""
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

MOST_AHEAD = 64          # clips that wait, read, until they are taken: 24 MB each at 20 frames of 448 x 448 in bf16


class ReadAhead:
    """read(clip) in a thread, clip by clip, in the order in which they are expected.

    An error in the thread, SystemExit too, is raised where its clip is taken.
    """

    def __init__(self, read, most=MOST_AHEAD):
        self.read = read
        self.most = most
        self.thread = ThreadPoolExecutor(1, "frames")
        self.lock = threading.RLock()
        self.wanted = {}                     # {key: clip} to be read
        self.coming = {}                     # {key: Future} of what was read, or is being read

    def expect(self, clips):
        """clips: {key: clip}, in the order in which they will be taken."""
        with self.lock:
            for key, clip in clips.items():
                if key not in self.coming:
                    self.wanted[key] = clip
        self.go_on()

    def go_on(self, _=None):
        """Begins with the next clip, unless one is being read. The thread itself calls it when it has read one.

        So it has never more than one before it, and a program that ends waits for no more.
        """
        with self.lock:
            is_reading = any(not future.done() for future in self.coming.values())
            if is_reading or not self.wanted or len(self.coming) >= self.most:
                return
            key = next(iter(self.wanted))
            clip = self.wanted.pop(key)
            with contextlib.suppress(RuntimeError):          # the program ends
                self.coming[key] = self.thread.submit(self.read, clip)
                self.coming[key].add_done_callback(self.go_on)

    def take(self, key, clip):
        """read(clip), which may have been done already."""
        with self.lock:
            self.wanted.pop(key, None)
            future = self.coming.pop(key, None)
        self.go_on()
        return future.result() if future else self.read(clip)
