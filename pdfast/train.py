"""Train a teacher by Algorithm 1 of Salimans & Ho 2022.

    python -m pdfast.train --preset digits --run runs/my-teacher

The same command run again resumes. The result, runs/my-teacher/teacher, is what `pdfast.distill --teacher` takes.
"""

from pdfast.arguments import train_arguments
from pdfast.checks import check_evaluation, check_job, check_plan
from pdfast.cli import run_command
from pdfast.engine.device import open_device
from pdfast.engine.log import RunLog
from pdfast.engine.machine import open_machine
from pdfast.engine.run import open_run
from pdfast.io import interrupt
from pdfast.io.names import shell_word
from pdfast.plan.dry_run import print_training_plan
from pdfast.stages import open_data, open_evaluator, say_what_begins, train_teacher, write_teacher


def main() -> None:
    config, extra = train_arguments()
    config.folder.check()
    check_job(config)
    if extra.dry_run:
        check_plan(config)
        print_training_plan(config, open_device(config.device), extra.gpu)
        return
    with open_machine(config) as machine:
        source = open_data(config, machine.world.device)
        check_evaluation(config.evaluation, source)
        with open_run(config, source, machine.world), RunLog(config.run, machine.world) as log:
            if (config.folder.teacher).exists():
                log.say(f"already finished: {config.folder.teacher}")
                return
            say_what_begins(config, machine, source, log)
            interrupt.install()
            network, training = train_teacher(config, machine, source, log)
            evaluator = open_evaluator(config, machine, source)
            write_teacher(config, machine, network, training, evaluator, config.evaluation_steps, log)
            teacher = config.folder.teacher
            log.count_bad_images()
            flags = ["--preset", config.preset, "--data", config.data, "--teacher", str(teacher)]
            flags += ["--evaluation.features", config.evaluation.features]
            flags += ["--evaluation.num-samples", str(config.evaluation.num_samples)]
            log.say(f"wrote {teacher}; distill it with: python -m pdfast.distill {' '.join(map(shell_word, flags))}")


if __name__ == "__main__":
    run_command(main)
