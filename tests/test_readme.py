"""The README's examples run as they stand, in order."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_examples_run():
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 4
    scope = {}
    for example in examples:
        exec(compile(example, str(README), "exec"), scope)
    assert scope["o"].shape == (scope["T"], scope["H"], scope["D"])
    assert scope["y"].shape == (scope["T"], 512)
