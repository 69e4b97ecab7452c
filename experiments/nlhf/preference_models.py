"""What a preference model can express and a reward model cannot (2312.00886, sections 3 and 7), measured.

    alignjax run experiments/nlhf/preference_models.py --workdir runs/models
    alignjax run experiments/nlhf/preference_models.py --workdir runs/small --set small=True

In the world of posts (``alignjax.tasks.post_world``) the annotators' majority is a cycle. Three forms are fitted to the
same pairs with the annotators' probabilities, over networks of three widths. There are more pairs than in
``why_nash.py``, and the fits are twice as long:

    pairwise  the logit of one token, in one order less that in the other: antisymmetric by construction
    paper     the paper's form: the logit of one token, each pair shown once; judges ask it in both orders
    reward    a Bradley-Terry reward model

The widest network writes several summaries of each test post, and all models compare every two of them. The table has
how right each is by the annotators, its position bias, and how many of the annotators' cycles it reproduces. "The best
reward" is fitted to the annotators' probabilities of these summaries, so that no reward has a lower cross-entropy.
"""

from dataclasses import replace
from pathlib import Path

import alignjax as aj

FORMS = {"pairwise": aj.pairwise, "paper": aj.one_order, "reward": aj.bradley_terry}
WIDTHS = (48, 96, 144)


def get_config(small: bool = False) -> aj.Experiment:
    """Returns the study; ``small`` is a short form of one width that learns little."""
    study = aj.load_module(Path(__file__).with_name("why_nash.py")).get_config(small)
    base, sft, pairs, fit, course = (study.stages[n] for n in ("base", "sft", "pairs", "preference", "course"))
    if not small:
        pairs, fit = replace(pairs, prompts=6000), replace(fit, loop=replace(fit.loop, steps=800))
    widths = WIDTHS[:1] if small else WIDTHS
    writer = f"sft{widths[-1]}"

    def of_width(width: int) -> dict[str, aj.Pretrain | aj.FineTune]:
        """Returns a fine-tuned network of another width, and what it begins as."""
        model = replace(base.model, width=width, head_dim=width // base.model.heads, hidden=3 * width)
        return {f"base{width}": replace(base, model=model), f"sft{width}": replace(sft, start=f"base{width}")}

    networks = {name: stage for width in widths for name, stage in of_width(width).items()}
    models = {
        f"{name}{width}": replace(fit, start=f"sft{width}", form=form, truth=None)
        for name, form in FORMS.items()
        for width in widths
    }
    compare = aj.CompareModels(
        models={f"{form} {width}": f"{form}{width}" for form in FORMS for width in widths},
        policy=writer,
        judge=aj.Oracle("annotators"),
        prompts=12 if small else 100,
        replies=3 if small else 6,
        writing=course.writing,
    )
    return replace(
        study,
        stages={
            "summaries": study.stages["summaries"],
            **networks,
            "pairs": replace(pairs, generator=writer),
            **models,
            "compare": compare,
        },
    )
