"""benchmarks/machine_code.py counts the loads that are under way when a loaded register is first used."""

from __future__ import annotations

import pytest

from benchmarks import machine_code

# Two loads at once, of which the second one is on a way around which a short row goes; then one by itself.
LISTING = """\
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
.text._ZN5pydeq12squared_normIfEEvv:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   BSSY B0, `(.L_x_0) ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64+0x1000] ;
        /*0050*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0060*/              @!P1 LDG.E.U16 R8, desc[UR4][R2.64+0x1000] ;
        /*0070*/                   PRMT R8, R8, 0x5410, R9 ;
.L_x_2:
        /*0080*/                   BSYNC B0 ;
.L_x_0:
        /*0090*/                   IADD3 R2, P2, R2, 0x10, RZ ;
        /*00a0*/                   FADD R5, R5, R10 ;
        /*00b0*/                   LDG.E.128 R12, desc[UR4][R2.64] ;
        /*00c0*/                   SHF.R.U32.HI R3, RZ, 0x10, R12 ;
        /*00d0*/                   LDG.E.64 R20, desc[UR4][R2.64] ;
        /*00e0*/                   EXIT ;
.L_x_3:
        /*00f0*/                   BRA `(.L_x_3);
"""


def test_counts_loads_until_the_first_use():
    (function,) = machine_code.parse(LISTING)
    assert function.name == "_ZN5pydeq12squared_normIfEEvv"
    assert len(function.code) == 16
    assert machine_code.loads_under_way(function) == [2, 1, 1]


def test_a_use_at_once_leaves_one_load_under_way():
    """As where halves are taken apart as soon as they are loaded."""
    code = LISTING.replace("LDC R1, c[0x0][0x28] ;", "NOP ;")
    code = code.replace("BSSY B0, `(.L_x_0) ;", "PRMT R30, R4, 0x7632, R30 ;")
    code = code.replace("BSYNC B0 ;", "NOP ;")
    (function,) = machine_code.parse(code)
    assert machine_code.loads_under_way(function) == [1, 1, 1]


@pytest.mark.parametrize(
    ("line", "reads"),
    [
        ("STG.E.128 desc[UR14][R106.64], R44 ;", {106, 44}),
        ("ISETP.GE.AND P6, PT, R74, UR9, PT ;", {74}),
        ("IMAD.WIDE R4, R5, 0x8, R6 ;", {5, 6}),
        ("IADD3 R44, P1, R75.reuse, 0x1, RZ ;", {75}),
        ("LDG.E.128 R44, desc[UR14][R104.64] ;", {104}),
    ],
)
def test_sources_of_an_instruction(line, reads):
    (function,) = machine_code.parse(f".text._Z1fv:\n        /*0000*/                   {line}\n")
    assert function.code[0].reads() == reads


def test_refuses_a_listing_without_kernels():
    with pytest.raises(ValueError, match="no kernel in this listing of nvdisasm: 'error'"):
        machine_code.parse("error")
