"""`simclr knn`: k-nearest-neighbor accuracy of the h of a run or an exported encoder."""

from simclr_jax.evaluation import embed, knn
from simclr_jax.programs import splits, trained


def run(workdir, *, step: int | None = None, overrides=()) -> float:
  """The program `simclr knn`: prints and returns the accuracy of the h of a run, or of an export, on its test images."""
  opened = trained.TrainedRun(workdir, step=step, overrides=overrides)
  train, test = splits.check_labeled(opened.config.data, opened.train_source, opened.test_source)
  (bank, bank_labels), (queries, labels) = opened.h(embed.train_examples(train, opened.config)), opened.h(test)
  c = opened.config.evaluate
  value = knn.accuracy(
    bank,
    bank_labels,
    queries,
    labels,
    k=c.knn_k,
    temperature=c.knn_temperature,
    num_classes=train.num_classes,
  )
  print(
    f"kNN (k={c.knn_k}) on h of step {opened.step}: {100 * value:.2f} %  "
    f"({len(labels):,} test images of {splits.describe(opened.config.data, test)}, bank of {len(bank_labels):,})"
  )
  return value


def main(flags, overrides) -> int:
  run(flags.workdir, step=flags.step, overrides=overrides)
  return 0
