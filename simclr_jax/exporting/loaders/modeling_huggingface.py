"""modeling_simclr.ResNet as a transformers model: AutoModel.from_pretrained(folder, trust_remote_code=True)."""

from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .modeling_simclr import ResNet


class SimCLRConfig(PretrainedConfig):
  model_type = "simclr"

  def __init__(self, network=None, **kwargs):
    self.network = network or {"depth": 50}
    super().__init__(**kwargs)


class SimCLRModel(PreTrainedModel):
  config_class = SimCLRConfig
  main_input_name = "pixel_values"

  def __init__(self, config):
    super().__init__(config)
    self.resnet = ResNet(**config.network)
    self.post_init()

  def forward(self, pixel_values, **kwargs):
    """pixel_values float32 [n, 3, h, w] in [0, 1] -> pooler_output, h [n, d]."""
    return BaseModelOutputWithPooling(pooler_output=self.resnet(pixel_values))
