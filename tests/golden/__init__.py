"""Golden records: the inputs and the results of training, so that no change to either goes unseen.

`records/*.json` hold, for small recipes that together cover every process, kind of data and U-Net family, the first
global batches (`batches`), eight steps of training (`training`), and random draws outside training (`draws`).
`pytest tests/golden` makes them again and compares; `mutations` shows that the comparison notices changes.

Records change only when training is meant to change, by

    python -m tests.golden.record

which prints what changed. CHANGELOG.md must then say why.
"""
