"""The progress bar gives what it is given, and says nothing where nobody watches."""

import sdnb


def test_items_pass_in_silence(capsys):
    assert list(sdnb.progress(range(3), desc="steps")) == [0, 1, 2]
    assert list(sdnb.progress((i for i in "ab"), total=2)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
