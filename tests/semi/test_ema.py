import torch
from torch import nn

from hiervl.semi.ema import EMATeacher, decay_at


def test_teacher_is_a_copy_outside_the_graph():
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = EMATeacher(student, horizon=10)
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    with torch.no_grad():
        student[0].weight.add_(1)
    assert not torch.equal(teacher.model[0].weight, student[0].weight)


def test_update_is_the_moving_average_of_parameters_and_buffers():
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    teacher = EMATeacher(student, horizon=4)
    expected = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    for step in range(1, 8):
        with torch.no_grad():
            student[0].weight.add_(1)
            student[1].running_mean.add_(2)
            student[1].num_batches_tracked.add_(1)
        teacher.update(student)
        decay = decay_at(step, 4)
        for name, value in student.state_dict().items():
            old = expected[name]
            expected[name] = value.clone() if not value.is_floating_point() else decay * old + (1 - decay) * value
        for name, value in teacher.model.state_dict().items():
            torch.testing.assert_close(value, expected[name])
    teacher.reset(student)
    assert torch.equal(teacher.model[0].weight, student[0].weight) and teacher.updates == 0


def test_decay_grows_to_its_horizon():
    decays = [decay_at(step, 20) for step in range(1, 100)]
    assert decays == sorted(decays) and decays[0] == 0.5 and decays[-1] == 1 - 1 / 20


def test_a_horizon_below_one_iteration_follows_the_student_exactly():
    student = torch.nn.Linear(2, 2)
    teacher = EMATeacher(student, horizon=0.25)
    with torch.no_grad():
        student.weight.add_(1)
    teacher.update(student)
    torch.testing.assert_close(teacher.model.weight, student.weight, check_stride=False)
