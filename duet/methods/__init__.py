"""Methods of unlearning.

objectives       OBJECTIVES: every method, a function and a line each
views            an objective, its options and rows -> what student and teacher are shown
counterfactual   the targets of `duet_deep`
evaluating       the loss of rows to evaluate on
noising          the noise of `undo`, and when it ends
"""
