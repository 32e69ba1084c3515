package swarm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
)

// ControlRoutes adds what operators may do to m, which must be out of the reach of others:
//
//	GET /limits  the rates as they are now
//	PUT /limits  changes those that the body names, e.g. {"upload_rate": "25Mbit/s"}, until the process ends
func (s *Swarm) ControlRoutes(m *http.ServeMux) {
	m.HandleFunc("GET /limits", func(w http.ResponseWriter, _ *http.Request) { s.sendRates(w) })
	m.HandleFunc("PUT /limits", func(w http.ResponseWriter, r *http.Request) {
		if err := s.changeRates(w, r); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		s.sendRates(w)
	})
}

func (s *Swarm) changeRates(w http.ResponseWriter, r *http.Request) error {
	s.ratesMu.Lock()
	defer s.ratesMu.Unlock()
	rates := s.Rates()
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4<<10))
	d.DisallowUnknownFields()
	err := d.Decode(&rates)
	if wrong := (*json.UnmarshalTypeError)(nil); errors.As(err, &wrong) && wrong.Field != "" {
		return fmt.Errorf(`limits: %s is a %s, want a text like "25Mbit/s", "10MiB/s" or "0"`, wrong.Field, wrong.Value)
	}
	if err != nil {
		return fmt.Errorf("limits: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("limits: want one JSON object, more follows it")
	}
	if err := rates.Validate(); err != nil {
		return err
	}
	s.limits.set(rates)
	s.log.Info("rates were changed by an operator", rates.attr())
	return nil
}

func (s *Swarm) sendRates(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(s.Rates()); err != nil {
		s.log.Debug("client went away", "error", err)
	}
}
