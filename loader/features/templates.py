"""Empty slots for templates, in the shapes that AlphaFold 2's model takes.

A batch has no templates. A model that has a template stack still needs its inputs; here they are all zeros,
and ``template_mask`` says that none of the slots holds one. That is what AlphaFold 2 makes of a chain without
template hits. Names and shapes are OpenFold's, as for labels (`features.structure_labels`).

Source: AlphaFold 2 ``config.py`` (eval.feat) and ``make_fixed_size``; OpenFold ``config.py``
(data.common.feat).
"""

from __future__ import annotations

import torch

from foldfeed.feature_store.format.structure import NUM_ATOMS
from foldfeed.loader.recipe import Recipe

NUM_TORSIONS = 7


def template_slots(
    recipe: Recipe, device: torch.device, leading: tuple[int, ...] = ()
) -> dict[str, torch.Tensor]:
    """Returns the features of T empty slots, T = ``recipe.num_templates``; none where it is 0.

    Args:
      recipe: for T and R = ``crop_residues``.
      device: of the tensors.
      leading: sizes of axes in front of all others: samples.
    Returns: zeros, behind the leading axes: template_mask float32 (T,), template_aatype int64 (T,
      R), template_sum_probs float32 (T, 1), template_all_atom_positions float32 (T, R, 37, 3),
      template_all_atom_mask float32 (T, R, 37), template_pseudo_beta float32 (T, R, 3) and
      template_pseudo_beta_mask float32 (T, R), template_backbone_rigid_tensor float32 (T, R, 4, 4) and
      template_backbone_rigid_mask float32 (T, R), template_torsion_angles_sin_cos and
      template_alt_torsion_angles_sin_cos float32 (T, R, 7, 2), template_torsion_angles_mask float32 (T, R,
      7).
    """
    if not recipe.num_templates:
        return {}
    shapes: dict[str, tuple[int, ...]] = {
        "template_aatype": (),
        "template_all_atom_positions": (NUM_ATOMS, 3),
        "template_all_atom_mask": (NUM_ATOMS,),
        "template_pseudo_beta": (3,),
        "template_pseudo_beta_mask": (),
        "template_backbone_rigid_tensor": (4, 4),
        "template_backbone_rigid_mask": (),
        "template_torsion_angles_sin_cos": (NUM_TORSIONS, 2),
        "template_alt_torsion_angles_sin_cos": (NUM_TORSIONS, 2),
        "template_torsion_angles_mask": (NUM_TORSIONS,),
    }
    slots, residues = recipe.num_templates, recipe.crop_residues
    found = {
        name: torch.zeros(
            (*leading, slots, residues, *rest),
            dtype=torch.int64 if name == "template_aatype" else torch.float32,
            device=device,
        )
        for name, rest in shapes.items()
    }
    return found | {
        "template_mask": torch.zeros((*leading, slots), device=device),
        "template_sum_probs": torch.zeros((*leading, slots, 1), device=device),
    }
