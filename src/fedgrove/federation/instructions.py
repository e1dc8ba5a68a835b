"""Natural Instructions (Mishra et al., ACL 2022) as BIG-bench carries it: 61 tasks, 193,250 pairs
in English.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fedgrove.federation.readers import Row

#: the tasks of each data set that they were made from
TASKS_OF = {
    "quoref": ("001_quoref_question_generation", "002_quoref_answer_generation"),
    "mctaco": (
        "003_mctaco_question_generation_event_duration",
        "004_mctaco_answer_generation_event_duration",
        "005_mctaco_wrong_answer_generation_event_duration",
        "006_mctaco_question_generation_transient_stationary",
        "007_mctaco_answer_generation_transient_stationary",
        "008_mctaco_wrong_answer_generation_transient_stationary",
        "009_mctaco_question_generation_event_ordering",
        "010_mctaco_answer_generation_event_ordering",
        "011_mctaco_wrong_answer_generation_event_ordering",
        "012_mctaco_question_generation_absolute_timepoint",
        "013_mctaco_answer_generation_absolute_timepoint",
        "014_mctaco_wrong_answer_generation_absolute_timepoint",
        "015_mctaco_question_generation_frequency",
        "016_mctaco_answer_generation_frequency",
        "017_mctaco_wrong_answer_generation_frequency",
        "018_mctaco_temporal_reasoning_presence",
        "019_mctaco_temporal_reasoning_category",
        "020_mctaco_span_based_question",
        "021_mctaco_grammatical_logical",
    ),
    "cosmosqa": (
        "022_cosmosqa_passage_inappropriate_binary",
        "023_cosmosqa_question_generation",
        "024_cosmosqa_answer_generation",
        "025_cosmosqa_incorrect_answer_generation",
    ),
    "drop": (
        "026_drop_question_generation",
        "027_drop_answer_type_generation",
        "028_drop_answer_generation",
    ),
    "winogrande": (
        "029_winogrande_full_object",
        "030_winogrande_full_person",
        "031_winogrande_question_generation_object",
        "032_winogrande_question_generation_person",
        "033_winogrande_answer_generation",
        "034_winogrande_question_modification_object",
        "035_winogrande_question_modification_person",
    ),
    "qasc": (
        "036_qasc_topic_word_to_generate_related_fact",
        "037_qasc_generate_related_fact",
        "038_qasc_combined_fact",
        "039_qasc_find_overlapping_words",
        "040_qasc_question_generation",
        "041_qasc_answer_generation",
        "042_qasc_incorrect_option_generation",
    ),
    "science": (
        "043_essential_terms_answering_incomplete_questions",
        "044_essential_terms_identifying_essential_words",
        "045_miscellaneous_sentence_paraphrasing",
        "046_miscellaenous_question_typing",  # its authors' own spelling
        "047_misc_answering_science_questions",
    ),
    "multirc": (
        "048_multirc_question_generation",
        "049_multirc_questions_needed_to_answer",
        "050_multirc_answerability",
        "051_multirc_correct_answer_single_sentence",
        "052_multirc_identify_bad_question",
        "053_multirc_correct_bad_question",
        "054_multirc_write_correct_answer",
        "055_multirc_write_incorrect_answer",
        "056_multirc_classify_correct_answer",
        "057_multirc_classify_incorrect_answer",
        "058_multirc_question_answering",
    ),
    "ropes": (
        "059_ropes_story_generation",
        "060_ropes_question_generation",
        "061_ropes_answer_generation",
    ),
}


def file_of(task: str) -> str:
    return f"{task}.json"


def natural_instructions(folder: Path) -> Iterator[Row]:
    """``{"prompt", "full_prompt", "input", "completion", "task", "source"}``, task after task.

    ``full_prompt`` is the task's whole definition and the input, as published; ``prompt`` has the
    definition's last sentence alone (what to do, after "Prompt:"), for small models and short
    inputs; ``input`` does not say what to do. ``completion`` is a list: the first answer is the one
    to learn, each counts as right. Rows whose first answer is empty are left out.
    """
    for source, tasks in TASKS_OF.items():
        for task in tasks:
            content = json.loads((folder / file_of(task)).read_text(encoding="utf-8"))
            definition = content["task_prefix"].strip()
            short = definition.rpartition("Prompt:")[2].strip()
            for example in content["examples"]:
                if not example["target"][0].strip():
                    continue
                yield {
                    "prompt": f"{short}\n{example['input']}",
                    "full_prompt": f"{definition}\n{example['input']}",
                    "input": example["input"],
                    "completion": example["target"],
                    "task": task,
                    "source": source,
                }
