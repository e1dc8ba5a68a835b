"""An ordinary Trainer script that is a client of a federation; the lines marked + are what was added.

    python examples/trainer_client.py SITE         # a site of a deployment (docs/deploy.md)
    python examples/trainer_client.py JOB.toml     # every client simulated on this machine

The job needs ``model.head = "stock"``, as the model below has its own head (docs/integrations.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from fedgrove import Job, run  # +
from fedgrove.integrations.trainer import Participant, attend, simulated  # +


def trainer(who: Participant) -> Trainer:  # +
    model = AutoModelForSequenceClassification.from_pretrained(
        who.job.model.name,  # +
        num_labels=who.parts.task.outputs,
    )
    arguments = TrainingArguments(
        "trainer-out",
        **who.settings,  # +
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=who.rows,  # + or a data set of your own, of the same rows
        data_collator=who.collate,  # + or your own
    )


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if place.is_dir():
        attend(place, trainer)  # + in place of trainer.train()
    else:
        run(Job.load(place), engine=simulated(trainer))  # +
