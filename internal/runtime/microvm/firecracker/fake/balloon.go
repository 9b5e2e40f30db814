package fake

import "encoding/json"

func setBalloon(m *machine, body map[string]json.RawMessage) (any, error) {
	var b balloon
	data, err := json.Marshal(body)
	if err == nil {
		err = json.Unmarshal(data, &b)
	}
	if err != nil {
		return nil, unreadable(err.Error())
	}
	if b.Amount > memorySize(m.config)>>20 {
		return nil, refusal("Balloon config error: Amount of pages requested is too large.")
	}
	m.balloon = &b
	return nil, nil
}

func updateBalloon(m *machine, body map[string]json.RawMessage) (any, error) {
	if m.balloon == nil {
		return nil, refusal("Balloon update error: " + errNoDevice)
	}
	var amount int64
	if err := json.Unmarshal(body["amount_mib"], &amount); err != nil {
		return nil, unreadable(err.Error())
	}
	if amount > memorySize(m.config)>>20 {
		return nil, refusal("Balloon update error: Balloon: Amount of pages requested is too large.")
	}
	m.balloon.Amount = amount
	return nil, nil
}

func balloonStats(m *machine, _ map[string]json.RawMessage) (any, error) {
	switch {
	case m.balloon == nil:
		return nil, refusal("Internal VMM error: " + errNoDevice)
	case m.balloon.Seconds == 0:
		return nil, refusal("Internal VMM error: Balloon: Received stats query when stats are disabled.")
	}
	n := m.balloon.Amount
	return map[string]int64{"target_pages": n << 8, "actual_pages": n << 8, "target_mib": n, "actual_mib": n}, nil
}

// hinting is the balloon, if free pages can be told to it.
func (m *machine) hinting() (*balloon, error) {
	if m.balloon == nil {
		return nil, refusal("Balloon update error: " + errNoDevice)
	}
	if !m.balloon.Hinting {
		return nil, refusal("Balloon update error: Balloon: Attempting to use hinting when not enabled")
	}
	return m.balloon, nil
}

// Commands of a run in which the guest tells its free pages. Numbers above are runs.
const (
	hintingStop = iota
	hintingDone
)

func startHinting(m *machine, body map[string]json.RawMessage) (any, error) {
	b, err := m.hinting()
	if err != nil {
		return nil, err
	}
	acknowledge := true
	_ = json.Unmarshal(body["acknowledge_on_stop"], &acknowledge) // was checked; missing: yes
	b.command = max(b.command, hintingDone) + 1
	b.said = new(int) // the guest has told all it has, and stopped
	if acknowledge {
		b.command = hintingDone
	}
	return nil, nil
}

func stopHinting(m *machine, _ map[string]json.RawMessage) (any, error) {
	b, err := m.hinting()
	if err != nil {
		return nil, err
	}
	b.command = hintingDone
	return nil, nil
}

func hintingStatus(m *machine, _ map[string]json.RawMessage) (any, error) {
	b, err := m.hinting()
	if err != nil {
		return nil, err
	}
	return map[string]any{"host_cmd": b.command, "guest_cmd": b.said}, nil
}
