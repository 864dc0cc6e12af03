"""A small hand-made mmCIF entry, as text: five residues, the second not observed. Needs no gemmi."""

MONOMERS = "1 1 ALA\n1 2 GLY\n1 3 MSE\n1 4 SER\n1 5 HYP\n"
HEAD = """data_{name}
_entry.id {name}
_entity.id 1
_entity.pdbx_description 'A small protein'
_exptl.method 'X-RAY DIFFRACTION'
_refine.ls_d_res_high 1.50
_pdbx_audit_revision_history.revision_date {date}
_entity_poly.entity_id 1
_entity_poly.type 'polypeptide(L)'
_entity_poly.pdbx_seq_one_letter_code_can AGMSP
loop_
_entity_poly_seq.entity_id
_entity_poly_seq.num
_entity_poly_seq.mon_id
1 1 ALA
1 2 GLY
1 3 MSE
1 4 SER
1 5 HYP
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_entity_id
_atom_site.label_seq_id
_atom_site.pdbx_PDB_ins_code
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.B_iso_or_equiv
_atom_site.auth_seq_id
_atom_site.auth_asym_id
_atom_site.pdbx_PDB_model_num
"""
ATOMS = (
    ("N", "N", ".", "ALA", 1),
    ("C", "CA", ".", "ALA", 1),
    ("C", "CA", ".", "MSE", 3),
    ("SE", "SE", "A", "MSE", 3),
    ("SE", "SE", "B", "MSE", 3),
    ("C", "CA", ".", "SER", 4),
    ("O", "OG", ".", "SER", 4),
    ("H", "HG", ".", "SER", 4),
    ("C", "CA", ".", "HYP", 5),
)


def sample(
    name: str,
    chains: dict[str, str],
    date: str = "2020-02-01",
    shift: float = 0.0,
    skip: dict[str, int] | None = None,
) -> bytes:
    """Returns an entry.

    Args:
      name: of it.
      chains: label_asym_id -> auth_asym_id.
      date: of its release.
      shift: added to every coordinate.
      skip: label_asym_id -> number of its first atoms that are left out.
    """
    lines = []
    for label, auth in chains.items():
        for number, (element, atom, alt, comp, seq) in enumerate(ATOMS):
            if number < (skip or {}).get(label, 0):
                continue
            x, y, z = (round(base + shift + number * 1.25, 3) for base in (10, -20, 30))
            place = f"{comp} {label} 1 {seq} ?"
            lines.append(
                f"ATOM {len(lines) + 1} {element} {atom} {alt} {place} {x} {y} {z} 0.5 {number}.25 "
                f"{seq - 2} {auth} 1\n"
            )
    return (HEAD.format(name=name, date=date) + "".join(lines)).encode()
