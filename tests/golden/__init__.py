"""Golden records: what training consists of and comes to, so that no change to either goes unseen.

`records/*.json` hold, for small recipes that together cover every process, kind of data and U-Net family, the first
global batches (`batches`), eight steps of training (`training`), and draws of other parts than training (`draws`).
`pytest tests/golden` makes them anew and compares; `mutations` shows that this would notice a change.

Records change only when training is meant to change, by

    python -m tests.golden.record

which prints what changed. Who changes one says why in CHANGELOG.md.
"""
