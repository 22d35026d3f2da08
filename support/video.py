"""Frames that can be trusted: of any video file, by their real times, and as patches for the vision tower.

decord decodes fast, but on damaged or oddly cut files it hangs for ever, gives wrong frames, or fails a whole
batch for one of them. So each call runs under a time limit, frames are found by their own time stamps and not
by the frame rate, and whatever cannot be read ends in a VideoError that names the file, the reason and the
cure.
"""
import math
import os
import threading
import warnings
from dataclasses import dataclass

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
except ImportError:          # --help works before anything is installed
    np = torch = F = None

DECODE_SECONDS = 60          # s that one call may take; decord 0.6.0 hangs for ever on some files
MOST_OPEN = 8                # files that stay open, because opening one scans all of it
TRIES = 3                    # for one frame, each on a fresh reader

# {(file, size, time of the last change, process): OpenVideo}, in the order of their last use
_open_videos = {}


class VideoError(ValueError):
    """A video that cannot be read; the text holds the file, the reason and the cure."""

    def __init__(self, file, reason):
        self.reason = f"{reason}. Leave it out, fetch it again, or re-encode it to H.264 in mp4"
        super().__init__(f"{file}: {self.reason}")


# ---------------------------------------------------------------- an open file
@dataclass
class OpenVideo:
    """A file that decord has open. Times are in s on the file's own clock."""
    file: str
    size: tuple | None       # (height, width) that frames are resized to; None: as they are
    reader: object           # of decord
    times: object            # (n,) of the frames
    end: float               # of the last frame
    key_frames: object       # (m,) indices of the key frames; empty where they are not known

    def reopen(self):
        """Takes a fresh reader, because after a failure the old one may give wrong frames."""
        self.reader = open_video(self.file, self.size).reader


def open_video(file, size):
    """file: a str. Raises VideoError, or whatever decord raises."""
    import decord
    decord.logging.set_level(decord.logging.QUIET)
    with open(file, "rb") as opened:
        head = opened.read(189)
    resized = {}
    if size:
        resized = {"height": size[0], "width": size[1]}
    # One thread, because with more of them damage costs more good frames, and short reads gain little.
    reader = decord.VideoReader(file, num_threads=1, **resized)
    spans = reader.get_frame_timestamp(range(len(reader)))      # (n, 2) start and end of each frame
    if len(spans) == 1:
        spans = np.array([[0, 0.04]])                           # a picture, whose time may be missing
    # Seen on real files: a key frame too late in MPEG-TS, and the wrong frame after a seek in such AVI.
    is_transport_stream = head[:1] == b"G" and head[188:] == b"G"
    lacks_times = abs(spans[0, 0]) > 1e6
    if is_transport_stream or lacks_times:
        what = "is MPEG-TS or lacks time stamps (H.264 in AVI)"
        raise VideoError(file, f"{what}: decord gives wrong frames")
    key_frames = np.array(reader.get_key_indices())
    # Of a file cut without re-encoding, decord counts the frames before 0 and never delivers them. Its index
    # i is then the i-th frame from 0 on, as it is in PyAV; asked for a higher one, it hangs.
    if spans[0, 0] < -1e-3:
        spans = spans[spans[:, 0] >= -1e-3]
        key_frames = key_frames[:0]
    return OpenVideo(file, size, reader, spans[:, 0], float(spans[-1, 1]), key_frames)


def in_time(file, size, work):
    """work(OpenVideo), under a time limit. Raises VideoError.

    The work runs in a thread, because no signal ends a hang of decord: where it hangs, a sleeping thread is
    left.
    """
    file = os.fspath(file)
    if not os.path.isfile(file):
        raise VideoError(file, "is not a file")
    if not os.path.getsize(file):
        raise VideoError(file, "is empty")
    # The process is part of the key, because decord's threads do not survive a fork.
    key = (file, size, os.stat(file).st_mtime_ns, os.getpid())
    # The file is taken out while it is in use, because a reader serves one thread at a time.
    already_open = _open_videos.pop(key, None)
    results = []
    errors = []

    def body():
        try:
            video = already_open
            if video is None:
                video = open_video(file, size)
            results.append((video, work(video)))
        except VideoError as error:
            errors.append(error)
        except Exception as error:       # decord's own DECORDError is a bare Exception
            message = " ".join(str(error).split())[-90:]
            reason = f"not decodable, or no video, or AV1 ({message})"
            errors.append(VideoError(file, reason))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(DECODE_SECONDS)
    if errors:
        raise errors[0]
    if not results:
        raise VideoError(file, f"did not decode in DECODE_SECONDS = {DECODE_SECONDS}")
    video, result = results[0]
    _open_videos[key] = video
    for old in list(_open_videos)[:-MOST_OPEN]:
        _open_videos.pop(old, None)
    return result


# ---------------------------------------------------------------- frames by their times
def probe_video(file):
    """-> {duration, start: s, frames, width, height}; decodes the first frame. Raises VideoError."""

    def work(video):
        frame = one_frame(video, 0)
        if frame is None:
            raise VideoError(video.file, "gives no first frame")
        height, width = frame.shape[:2]
        start = float(video.times[0])
        return {"duration": video.end - start, "start": start, "frames": len(video.times),
                "width": width, "height": height}

    return in_time(file, None, work)


def read_frames(file, times, size=None):
    """The frames nearest to `times` by their real time stamps -> uint8 (n, H, W, 3).

    times: s on the file's own clock, which begins at probe_video's start; in any order. size: (H, W) to
    resize to. Where the file is damaged, the nearest other wanted frame stands in, with a warning. Raises
    VideoError where less than half of the frames decode, or a time lies more than 1 s outside of the video.
    """
    times = np.asarray(times, dtype=float)
    return in_time(file, size, lambda video: nearest_frames(video, times))


def nearest_frames(video, times):
    """`read_frames` of an open file."""
    first, last = times.min(), times.max()
    start = video.times[0]
    asked_for = f"from {first:.1f} to {last:.1f} s"
    if first < start - 1 or last > video.end + 1:
        there = f"only from {start:.1f} to {video.end:.1f} s"
        raise VideoError(video.file, f"has no frames {asked_for}, {there}")
    distances = np.abs(video.times - times[:, None])            # (n, frames of the file)
    wanted, place = np.unique(distances.argmin(1), return_inverse=True)
    indices = with_lead(video.key_frames, wanted)
    try:
        frames = video.reader.get_batch(indices).asnumpy()
        return frames[np.searchsorted(indices, wanted)][place]
    except Exception:                    # decord's own; one bad frame fails the whole batch
        video.reopen()
    # They are read one by one, so that only the bad ones are lost.
    good = {}
    for i in wanted.tolist():
        frame = one_frame(video, i)
        if frame is not None:
            good[i] = frame
    lost = f"is damaged: {len(wanted) - len(good)} of {len(wanted)} frames {asked_for} are lost"
    if 2 * len(good) < len(wanted):
        raise VideoError(video.file, lost)
    warnings.warn(f"{video.file} {lost}")
    frames = []
    for i in wanted:
        nearest = min(good, key=lambda j: abs(j - i))
        frames.append(good[nearest])
    return np.stack(frames)[place]


def with_lead(key_frames, wanted):
    """The wanted indices, and before some of them those that must be read with them; sorted, each once.

    A seek to the key frame of an open group, as HEVC has them, drops the frames that lead up to it, and
    decord miscounts from there. So what follows a key frame at once is read on from the last frame of the
    group before.
    """
    groups = np.searchsorted(key_frames, wanted, "right") - 1
    runs = [wanted]
    for i, group in zip(wanted, groups):
        if group <= 0:
            continue
        behind_key = i - key_frames[group]
        length_before = key_frames[group] - key_frames[group - 1]
        if behind_key < 8 < length_before:
            runs.append(np.arange(key_frames[group] - 1, i))
    return np.unique(np.concatenate(runs))


def one_frame(video, i):
    """Frame i (H, W, 3), or None where it cannot be read.

    It is tried several times, because decord's worker runs ahead: whether it meets the damage behind a frame
    before it hands out that frame is a matter of luck.
    """
    for _ in range(TRIES):
        try:
            return video.reader[i].asnumpy()
        except Exception:                # decord's own DECORDError is a bare Exception
            video.reopen()
    return None


def frame_times(clip, n):
    """Where the n frames of a clip lie, in s of its file. A shorter last clip gets fewer, but at least two.

    >>> frame_times({"start": 20, "end": 30, "offset": 0}, 4)
    [1.25, 3.75, 6.25, 8.75]
    """
    length = clip["end"] - clip["start"]
    share = min(1, length / 10)
    n = max(2, round(n * share))
    return [clip["offset"] + (i + 0.5) * length / n for i in range(n)]


# ---------------------------------------------------------------- frames as the vision tower reads them
def frame_size(height, width, pixels):
    """(height, width) in multiples of 32, at most `pixels`, the aspect ratio kept as well as that allows.

    >>> frame_size(720, 1280, 448 * 448)
    (320, 576)
    """
    h = max(1, round(height / 32)) * 32
    w = max(1, round(width / 32)) * 32
    if h * w > pixels:
        scale = math.sqrt(height * width / pixels)
        h = max(32, math.floor(height / scale / 32) * 32)
        w = max(32, math.floor(width / scale / 32) * 32)
    return h, w


def frames_to_patches(frames, pixels):
    """What the vision tower reads of frames (n, H, W, 3) uint8, each resized to at most `pixels`.

    It gives the values of Qwen3VLVideoProcessor, which needs torchvision. Two frames make a pair, so an odd n
    repeats the last. Returns patches (n/2 * h * w, 3 * 2 * 16 * 16) in [-1, 1] and the grid (n/2, h, w), in
    patches of 16 pixels. The 2 x 2 patches of one token are neighbours.
    """
    x = torch.as_tensor(frames).permute(0, 3, 1, 2)             # (n, 3, H, W) uint8
    size = frame_size(*x.shape[2:], pixels)
    if size != tuple(x.shape[2:]):                              # while uint8, as the library does it
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
    if len(x) % 2:
        x = torch.cat([x, x[-1:]])
    pairs = len(x) // 2
    h = size[0] // 16
    w = size[1] // 16
    x = x.float() / 127.5 - 1
    x = x.view(pairs, 2, 3, h // 2, 2, 16, w // 2, 2, 16)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)            # (pairs, h/2, w/2, 2, 2, 3, 2, 16, 16)
    return x.reshape(pairs * h * w, -1), (pairs, h, w)
