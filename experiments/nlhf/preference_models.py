"""What a preference model can express and a reward model cannot (2312.00886, sections 3 and 7), measured.

    alignjax run experiments/nlhf/preference_models.py --workdir runs/models
    alignjax run experiments/nlhf/preference_models.py --workdir runs/small --set small=True

In the world of posts (``alignjax.tasks.post_world``) the annotators' majority is a cycle. Three forms are fitted to the
same pairs with the annotators' probabilities, over networks of three widths that were pretrained on one corpus:

    pairwise  the logit of one token, in one order less that in the other: antisymmetric by construction
    paper     the paper's form: the logit of one token, each pair shown once; judges ask it in both orders
    reward    a Bradley-Terry reward model

The widest network writes several summaries of each test post, and all models compare every two of them. The table has
how right each is by the annotators, its position bias, and how many of the annotators' cycles it reproduces; the best
reward is what any reward could say of the same summaries.
"""

from dataclasses import replace

import alignjax as aj
from alignjax.tasks import post_world

FORMS = {"pairwise": aj.pairwise, "paper": aj.one_order, "reward": aj.bradley_terry}
PROMPT, REPLY = 64, 20  # tokens


def get_config(small: bool = False) -> aj.Experiment:
    """Returns the study; ``small`` is a short form of one width that learns little."""
    widths = (64,) if small else (32, 64, 96)
    world = post_world.PostWorld(people=2, known=4, facts=2) if small else post_world.PostWorld(people=8, known=12)
    writing = aj.Writing(max_new_tokens=REPLY, buckets=(PROMPT,), batch=128)
    base = aj.Pretrain(
        model=aj.TransformerConfig(vocab_size=512, width=96, layers=2, heads=3, kv_heads=1, head_dim=32, hidden=256),
        documents=10_000,
        row=128,
        adam=aj.Adam(lr=3e-3, warmup=50, weight_decay=0.01),
        loop=aj.Loop(steps=500, batch=16),
    )
    labels = aj.Label(
        generator=f"base{widths[-1]}",
        method=aj.Judged(aj.Oracle("annotators")),
        split="train",
        prompts=1600,
        writing=writing,
    )
    fit = aj.FitPreference(
        start=f"base{widths[-1]}",
        pairs="pairs",
        adam=aj.Adam(lr=1e-3),
        loop=aj.Loop(steps=100, batch=32),
        buckets=(PROMPT,),
        response=REPLY,
    )
    compare = aj.CompareModels(
        models={f"{form} {width}": f"{form}{width}" for form in FORMS for width in widths},
        policy=f"base{widths[-1]}",
        judge=aj.Oracle("annotators"),
        prompts=80,
        replies=6,
        writing=writing,
    )
    if small:
        base = replace(base, documents=1000, adam=aj.Adam(lr=5e-3, warmup=20), loop=aj.Loop(steps=150, batch=16))
        labels = replace(labels, prompts=64, writing=replace(writing, batch=64))
        fit = replace(fit, loop=aj.Loop(steps=2, batch=8))
        compare = replace(compare, prompts=8, replies=3, writing=replace(writing, batch=8))

    def of_width(width: int) -> aj.Pretrain:
        """Returns the base of another width."""
        return replace(base, model=replace(base.model, width=width, heads=width // 32, hidden=8 * width // 3))

    bases = {f"base{width}": of_width(width) for width in widths}
    models = {
        f"{name}{width}": replace(fit, start=f"base{width}", form=form)
        for name, form in FORMS.items()
        for width in widths
    }
    stages = {**bases, "pairs": labels, **models, "compare": compare}
    return aj.Experiment(task=post_world.post_task(world), stages=stages)
