"""Frames that can be trusted: read from any video file by their real times; and patches for the vision tower.

There is one rule for all formats, after which PyAV (FFmpeg) reads them: begin at the last key frame before the
wanted frame, and decode until a frame bears the wanted time stamp. Neither the frame rate nor the seek of a
container is trusted. decord reads the files for which it has proved right, against PyAV. Each call runs under a
time limit, and whatever cannot be read ends in a VideoError that names the file, the reason and the cure.
"""
import contextlib
import importlib.util
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

DECODE_SECONDS = 60          # s that one call may take; a slow disk or a broken file can hold it for ever
MOST_OPEN = 8                # files that stay open, because opening one scans all of it
KEYS_BACK = 3                # key frames that are tried for one frame, each before the last
SEEK_EARLY = 1               # s before a key frame that is looked for, because in MPEG-TS seeks end too late
SAME_FRAME = 3               # of 255, mean difference at most between two ways of decoding one frame
KEYS_TRIED = 16              # key frames behind which decord is compared with PyAV
AS_NEAR = 0.0005             # s by which distances in time may differ and still count as equal

# {(file, bytes, time of the last change, process, who opened it): OpenVideo or DecordVideo}, in the order of
# their last use
_open_videos = {}
# Files that decord has failed on, though it had proved right.
_left_to_pyav = set()


class VideoError(ValueError):
    """A video, or a part of it, that cannot be read; the text holds the file, the reason and the cure."""

    def __init__(self, file, fault):
        self.fault = fault
        self.reason = f"{fault}. Leave it out, fetch it again, or re-encode it to H.264 in mp4"
        super().__init__(f"{file}: {self.reason}")


class LostVideo(VideoError):
    """A file of which nothing can be read: it is not there, or is no video."""


# ---------------------------------------------------------------- an open file
@dataclass
class OpenVideo:
    """A file that PyAV has open. A stamp is a time as the file has it, in units of the stream."""
    file: str
    container: object
    stream: object
    stamps: object           # (n,) of the frames that are shown, ascending
    times: object            # (n,) the same in s, on the file's own clock
    end: float               # of the last frame, in s
    keys: object             # (m,) stamps of the key frames, ascending
    is_counted: bool         # the file has no time stamps: frames are counted from a key frame on
    decoding: object = None  # what decoded the last frame, and goes on after it
    at: int | None = None    # the stamp of that frame

    def __post_init__(self):
        from av.video.reformatter import VideoReformatter
        self.colours = VideoReformatter()
        self.width = self.stream.codec_context.width
        self.height = self.stream.codec_context.height

    def frames_from(self, key, stamp):
        """(stamp, frame) from key frame number `key` on, or from the last frame on where it lies in between.

        stamp: of the frame that is looked for.
        """
        is_on_the_way = self.at is not None and self.keys[key] <= self.at < stamp
        if not is_on_the_way:
            self.decoding = decoded(self, self.keys[key])
        for self.at, frame in self.decoding:
            yield self.at, frame
        self.at = None       # nothing follows


def open_video(file):
    """The OpenVideo of a path. Raises LostVideo, or an error of PyAV."""
    import av
    # A relative path with a colon in it would be taken for an address.
    container = av.open(os.path.abspath(file))
    stream = container.streams.best("video")
    if stream is None:
        raise LostVideo(file, "holds no video")
    # With more threads damage costs more good frames, and short reads gain little.
    stream.codec_context.thread_count = 1
    # AVI has no time stamps. What FFmpeg makes up for these codecs is the order in which frames are stored,
    # which is not the one in which they are shown.
    is_avi = container.format.name == "avi"
    is_counted = is_avi and stream.codec.canonical_name in ("h264", "hevc")
    shown, keys, length = scan(container, stream, is_counted)
    if None in shown + keys:
        raise LostVideo(file, "has frames without a time stamp")
    if keys != sorted(keys):
        raise LostVideo(file, "has time stamps that begin anew, like files joined without encoding")
    # What comes before the first key frame cannot be decoded.
    stamps = np.unique([stamp for stamp in shown if keys and stamp >= keys[0]])
    if not len(stamps):
        raise LostVideo(file, "holds no frame")
    first = stamps[0] if is_avi else (stream.start_time or 0)
    times = (stamps - first) * float(stream.time_base)
    length = float(length * stream.time_base) or 0.04    # of a single picture it may be missing
    return OpenVideo(file, container, stream, stamps, times, float(times[-1]) + length,
                     np.array(keys), is_counted)


def stamp_of(packet, is_counted):
    return packet.dts if is_counted else packet.pts


def scan(container, stream, is_counted):
    """Stamps of the frames that are shown and of the key frames, as they are stored; how long the last one lasts.

    Nothing is decoded. Of a file that is cut off, these are the frames before that.
    """
    import av
    shown = []
    keys = []
    length = 0
    with contextlib.suppress(av.FFmpegError):
        for packet in container.demux(stream):
            if not packet.size:          # the last one, which asks for the rest of the frames
                continue
            stamp = stamp_of(packet, is_counted)
            if packet.is_keyframe:
                keys.append(stamp)
            if not packet.is_discard:    # those before a cut that was made without encoding are
                shown.append(stamp)
                length = packet.duration or length
    return shown, keys, length


def decoded(video, key):
    """(stamp, frame) from the key frame with the stamp `key` on, in the order in which frames are shown."""
    import av
    count = np.searchsorted(video.stamps, key)           # of the frames before it
    has_begun = False
    # What comes after damage builds on it, up to the next key frame, so an error is the end.
    with contextlib.suppress(av.FFmpegError):
        for packet in packets_near(video, key):
            if packet.is_keyframe and stamp_of(packet, video.is_counted) == key:
                has_begun = True
            if not has_begun:
                continue
            if packet.is_corrupt:
                return
            for frame in packet.decode():
                if frame.is_corrupt:
                    return
                stamp = frame.pts
                if video.is_counted:
                    stamp = video.stamps[min(count, len(video.stamps) - 1)]
                    count += 1
                if stamp is not None:
                    yield stamp, frame


def packets_near(video, key):
    """The packets from somewhere before the key frame with the stamp `key` on."""
    import av
    early = int(key - SEEK_EARLY / video.stream.time_base)
    try:
        video.container.seek(early, stream=video.stream)
    except av.FFmpegError:                               # before the beginning, which some refuse
        video.container.seek(int(key), stream=video.stream)
    return video.container.demux(video.stream)


def in_time(file, work, open_file=open_video):
    """work(what open_file gives), under a time limit. Raises VideoError; LostVideo where opening fails.

    The work runs in a thread, because nothing else ends a call that hangs: where it does, a sleeping thread is
    left.
    """
    file = os.fspath(file)
    if not os.path.isfile(file):
        raise LostVideo(file, "is not a file")
    if not os.path.getsize(file):
        raise LostVideo(file, "is empty")
    # The process is part of the key, because what FFmpeg has open does not survive a fork.
    key = (file, os.path.getsize(file), os.stat(file).st_mtime_ns, os.getpid(), open_file)
    # The file is taken out while it is in use, because a decoder serves one thread at a time.
    already_open = _open_videos.pop(key, None)
    results = []
    errors = []

    def body():
        video = already_open
        try:
            if video is None:
                video = open_file(file)
            results.append((video, work(video)))
        except VideoError as error:
            errors.append(error)
        except Exception as error:       # those of PyAV and decord are of many kinds
            message = " ".join(str(error).split())[:90]
            kind = LostVideo if video is None else VideoError
            errors.append(kind(file, f"not decodable, or no video ({message})"))

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
    """-> {duration, start: s, frames, width, height, created}; decodes the first frame. Raises VideoError.

    created: the time of creation in the file's metadata, or None.
    """

    def work(video):
        frame = frame_at(video, 0)
        if frame is None:
            raise VideoError(video.file, "gives no first frame")
        height, width = frame.shape[:2]
        start = float(video.times[0])
        return {"duration": video.end - start, "start": start, "frames": len(video.times),
                "width": width, "height": height, "created": created_at(video)}

    return in_time(file, work)


def created_at(video):
    """The time of creation in a file's metadata, a text in UTC, or None. GoPro writes local time there."""
    created = video.container.metadata.get("creation_time")
    is_local = "GoPro" in video.stream.metadata.get("handler_name", "")
    return created.removesuffix("Z") if created and is_local else created


def read_frames(file, times, reader="PyAV"):
    """The frames nearest to `times` by their real time stamps -> uint8 (n, H, W, 3).

    times: s on the file's own clock, which begins at probe_video's start; in any order. reader: or "decord",
    where `decord_is_right`. Where the file is damaged, the nearest other wanted frame stands in, with a warning.
    Raises VideoError where less than half of the frames decode, or a time lies more than 1 s outside of the
    video.
    """
    times = np.asarray(times, dtype=float)
    if reader == "decord" and has_decord() and file not in _left_to_pyav:
        try:
            return read_by_decord(file, times)
        except VideoError as error:
            _left_to_pyav.add(file)
            if os.path.isfile(file):             # a lost one is named below
                print(f"*** {file}: decord fails here ({error.fault}), so PyAV reads it from now on ***")
    return in_time(file, lambda video: nearest_frames(video, times))


def nearest_frames(video, times):
    """`read_frames` of an open file."""
    wanted, place = nearest(video, times)
    good = {}
    for i in wanted.tolist():
        frame = frame_at(video, i)
        if frame is not None:
            good[i] = frame
    if len(good) < len(wanted):
        asked_for = f"from {times.min():.1f} to {times.max():.1f} s"
        lost = f"is damaged: {len(wanted) - len(good)} of {len(wanted)} frames {asked_for} are lost"
        if 2 * len(good) < len(wanted):
            raise VideoError(video.file, lost)
        warnings.warn(f"{video.file} {lost}")
    frames = []
    for i in wanted:
        stands_in = min(good, key=lambda j: abs(j - i))
        frames.append(good[stands_in])
    return np.stack(frames)[place]


def nearest(video, times):
    """(indices of the frames nearest to `times`, ascending, each once; for each time its place among them)."""
    first, last = times.min(), times.max()
    start = video.times[0]
    if first < start - 1 or last > video.end + 1:
        there = f"only from {start:.1f} to {video.end:.1f} s"
        raise VideoError(video.file, f"has no frames from {first:.1f} to {last:.1f} s, {there}")
    distances = np.abs(video.times - times[:, None])     # (n, frames of the file)
    # Of two that are as near, the earlier: how a reader rounds its time stamps should not decide.
    is_nearest = distances <= distances.min(1, keepdims=True) + AS_NEAR
    return np.unique(is_nearest.argmax(1), return_inverse=True)


def frame_at(video, i, keys_back=0):
    """Frame i (H, W, 3), or None where it cannot be decoded.

    keys_back: how many key frames before the last one decoding begins. Where that one gives nothing, because its
    group is damaged or is open, those before it are tried.
    """
    stamp = video.stamps[i]
    last_key = np.searchsorted(video.keys, stamp, "right") - 1 - keys_back
    for key in range(last_key, last_key - KEYS_BACK, -1):
        if key < 0:
            break
        for found, frame in video.frames_from(key, stamp):
            if found == stamp:
                return picture(video, frame)
            if found > stamp:
                break
    return None


def picture(video, frame):
    """A frame as an array (H, W, 3), uint8, upright."""
    # All have the size of the first, though it may change within a file.
    shape = {"width": video.width, "height": video.height}
    array = video.colours.reformat(frame, format="rgb24", **shape).to_ndarray()
    quarters = round(frame.rotation / 90) % 4                  # as a phone notes them
    return np.ascontiguousarray(np.rot90(array, quarters)) if quarters else array


def check_seeks(file, times):
    """Raises VideoError where a frame is another one when decoding begins at an earlier key frame.

    So a format whose seeks or stamps deceive is found, whatever it is, and does not give wrong frames.
    """
    times = np.asarray(times, dtype=float)

    def work(video):
        for i in nearest(video, times)[0]:
            frame = frame_at(video, i)
            again = frame_at(video, i, keys_back=1)
            if frame is None or again is None:
                continue                 # damage, which is found otherwise; or in the first group of frames
            difference = np.abs(frame.astype(int) - again).mean()
            if difference > SAME_FRAME:
                at = f"at {video.times[i]:.1f} s"
                raise VideoError(video.file, f"gives another frame {at} after a seek than without one")

    in_time(file, work)


def frame_times(clip, n):
    """Where the n frames of a clip lie, in s of its file. A shorter last clip gets fewer, but at least two.

    >>> frame_times({"start": 20, "end": 30, "offset": 0}, 4)
    [1.25, 3.75, 6.25, 8.75]
    """
    length = clip["end"] - clip["start"]
    share = min(1, length / 10)
    n = max(2, round(n * share))
    return [clip["offset"] + (i + 0.5) * length / n for i in range(n)]


# ---------------------------------------------------------------- decord, where it proves right
@dataclass
class DecordVideo:
    """A file that decord has open."""
    file: str
    reader: object
    times: object            # (n,) of the frames, in s on the file's own clock
    end: float               # of the last frame


def has_decord():
    return importlib.util.find_spec("decord") is not None


def open_by_decord(file):
    import decord
    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(os.path.abspath(file), num_threads=1)
    spans = reader.get_frame_timestamp(range(len(reader)))      # (n, 2) start and end of each frame
    times = spans[:, 0].astype(float)
    return DecordVideo(file, reader, times, end=float(spans[-1, 1]))


def read_by_decord(file, times):
    """`read_frames` by decord, all or nothing. Raises VideoError."""

    def work(video):
        wanted, place = nearest(video, times)
        return video.reader.get_batch(wanted).asnumpy()[place]

    return in_time(file, work, open_by_decord)


def decord_is_right(file, n):
    """Whether decord gives the same as PyAV, to the bit: all time stamps, and some frames, read by seek.

    n: of the frames that are tried, how many are spread over the file. False, too, where decord is not
    installed, refuses the file or hangs.
    """
    if not has_decord():
        return False
    try:
        times, tried = in_time(file, lambda video: (video.times, times_to_try(video, n)))
        claimed = in_time(file, lambda video: video.times, open_by_decord)
        if len(claimed) != len(times):
            return False
        if np.abs(claimed - times).max() > AS_NEAR / 2:
            return False
        # In random order, so that each is read by seek, and a few at once, as those of a clip are.
        shuffled = np.random.default_rng(0).permutation(tried)
        for some in np.array_split(shuffled, math.ceil(len(tried) / 4)):
            if not np.array_equal(read_by_decord(file, some), read_frames(file, some)):
                return False
    except VideoError:
        return False
    return True


def times_to_try(video, n):
    """Times of n frames spread over a file, its first and last, and those right behind key frames.

    Decoders that seek go wrong most behind key frames: of some formats, only behind a few of them.
    """
    last = len(video.times) - 1
    spread = np.linspace(0, last, n + 2).astype(int)
    some_keys = np.linspace(0, len(video.keys) - 1, KEYS_TRIED).astype(int)
    keys = np.searchsorted(video.stamps, video.keys[some_keys])
    behind_keys = np.minimum(keys + 1, last)
    tried = np.unique(np.concatenate([spread, behind_keys]))
    return video.times[tried]


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
