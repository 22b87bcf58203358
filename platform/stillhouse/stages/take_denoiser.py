"""The stage `take_denoiser`: a text-to-image network of the hub, as the family's own folder."""

from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate

from stillhouse.data.images import ImageData
from stillhouse.errors import UserError
from stillhouse.ranges import Finite
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.denoiser_folders import check_shape
from stillhouse.students.denoisers import Denoiser
from stillhouse.students.hub_networks import network_of


@dataclass(frozen=True, kw_only=True)
class TakeDenoiser:
    """Hand on the network of a pipeline, with the encoder and autoencoder of the data beside it.

    Attributes:
        path: the folder of a pipeline of diffusers, or an id of the hub.
        revision: of the hub; null for the newest.
        data: LightningDataModule, partial, called with (seed): captions as the network reads them,
            and latents or pixels.
        guidance_scale: its default.
    """

    path: str
    revision: str | None = None
    data: dict[str, Any]
    guidance_scale: Finite

    def __call__(self, context: StageContext) -> StageResult:
        """Read it, hold it against the data, and save."""
        key = f"stages.{context.name}"
        data: ImageData = instantiate(self.data, _recursive_=False)(0)
        data.prepare_data()
        if data.captions is None:
            raise UserError(
                f"{key}.data: the networks of pipelines are told captions; expected "
                "data.captions_path, of a stage of conf/stage/embed_captions.yaml"
            )
        model, scheduler = network_of(self.path, revision=self.revision, key=f"{key}.path")
        denoiser = Denoiser(
            model,
            scheduler=scheduler,
            empty=data.captions.empty,
            sample_size=data.image_shape[-1],
        )
        check_shape(denoiser, data, key=f"{key}.path", path=self.path)
        denoiser.save(context.output, data, times={}, guidance_scale=self.guidance_scale)
        return StageResult(metrics={"parameters": sum(p.numel() for p in model.parameters())})
