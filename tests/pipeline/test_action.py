from megatron_aquila.pipeline.action import Action, Op


def test_notation_is_torchs() -> None:
    assert str(Action(Op.F, 2, 10)) == "2F10"


def test_inputs_are_the_dependency_graph() -> None:
    assert Action(Op.F, 0, 3).inputs(4) == ()
    assert Action(Op.F, 2, 3).inputs(4) == (Action(Op.F, 1, 3),)
    assert Action(Op.B, 3, 3).inputs(4) == (Action(Op.F, 3, 3),)
    assert Action(Op.B, 1, 3).inputs(4) == (Action(Op.F, 1, 3), Action(Op.B, 2, 3))
    assert Action(Op.I, 1, 3).inputs(4) == (Action(Op.F, 1, 3), Action(Op.I, 2, 3))
    assert Action(Op.W, 1, 3).inputs(4) == (Action(Op.I, 1, 3),)
