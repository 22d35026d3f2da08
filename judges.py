"""Who judges memories and who reads them to answer questions: the one interface, and what `JUDGE` can name.

A judge has one method, `ask(kind, items) -> list`, with None for a verdict that failed. Kinds and items:
  "faithful"  {context, memory}               -> bool: all of it is in picture or subtitles, and it connects
  "clean"     {previous, memory}              -> bool: it repeats nothing that the memory before it states
  "rank"      {context, memories}             -> ranks, 1 = richest; ties share the mean rank
  "prefer"    {questions, first, second}      -> "first" | "second" | "tie", by what the questions are after
  "answer"    {entries, question, options}    -> letter or "insufficient"; entries: [start, end, memory] in s

JUDGE="tiny" is the embedded world's exact one, which knows each clip's facts as a video judge sees the video.
"""
import importlib

from common import need, read_jsonl


def load_judge(S):
    """The judge and reader of S.JUDGE. Raises SystemExit for an unknown one."""
    if S.JUDGE != "tiny":
        raise SystemExit(f'JUDGE={S.JUDGE} is unknown: the only judge so far is "tiny", '
                         'for the embedded world')
    return importlib.import_module("tiny.world").Judge(read_jsonl(need(S, "streams/truth.jsonl")))
