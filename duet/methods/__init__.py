"""Methods of unlearning.

objectives       OBJECTIVES: every method, a function and a line each
views            an objective, its options and rows -> what student and teacher are shown
asking           what is asked of the frozen teacher before training; reuse: steering prefixes that it reads once
counterfactual   the targets of `duet_deep`
directions       `adapter_directions: contrast`: an adapter that reads only where forget and retain rows differ
sharpness        sharpness-aware steps
selectivity      the one gradient of RepSelect, and its steps
noising          the noise of `undo`, and when it ends
evaluating       the loss of rows to evaluate on
"""
