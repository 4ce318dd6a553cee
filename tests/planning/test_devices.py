import pytest

from hfpretrain.planning import devices
from hfpretrain.recipe.schema import RecipeError


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("AMD Instinct MI250X", "MI250X"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_device_is_found_by_its_own_name_and_by_that_of_torch(torch_name, name):
    assert devices.device_by_torch_name(torch_name).name == name
    assert devices.device_by_name(torch_name).name == name == devices.device_by_name(name.lower()).name


def test_a_device_that_is_not_in_the_table_is_not_guessed():
    for name in ("NVIDIA L40", "NVIDIA A10", "Intel Xeon (2 threads)", "mps"):
        assert devices.device_by_torch_name(name) is None and devices.peak_flops(name) is None
    with pytest.raises(RecipeError, match="unknown device; did you mean `H200-141GB`"):
        devices.device_by_name("H200-140GB")


def test_the_peak_depends_on_the_precision():

    assert devices.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert devices.peak_flops("NVIDIA H100 80GB HBM3", "no") == 67e12
    assert not devices.device_by_torch_name("Tesla V100-SXM2-16GB").bf16
