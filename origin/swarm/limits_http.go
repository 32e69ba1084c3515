package swarm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"kraken/proto/registry"
	"kraken/proto/transport"
)

// ControlRoutes adds what operators may do to m, which must be out of the reach of others:
//
//	GET /limits  the rates as they are now
//	PUT /limits  changes those that the body names, e.g. {"upload_rate": "25Mbit/s"}, until the process ends
func (s *Swarm) ControlRoutes(m *http.ServeMux) {
	m.HandleFunc("GET /limits", func(w http.ResponseWriter, _ *http.Request) { s.sendRates(w) })
	m.HandleFunc("PUT /limits", func(w http.ResponseWriter, r *http.Request) {
		if err := s.changeRates(w, r); err != nil {
			registry.WriteError(w, r, fmt.Errorf("%w: %w", errLimits, err))
			return
		}
		s.sendRates(w)
	})
}

// errLimits is a body that names no limits.
var errLimits = &registry.Error{Code: "LIMITS_INVALID", Status: http.StatusBadRequest, Message: `want a JSON object of limits, e.g. {"upload_rate": "25Mbit/s"}; GET /limits shows all`}

func (s *Swarm) changeRates(w http.ResponseWriter, r *http.Request) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4<<10))
	d.DisallowUnknownFields()
	if err := s.limiter.Change(func(rates *Rates) error { return decodeRates(d, rates) }); err != nil {
		return err
	}
	s.log.Info("rates were changed by an operator", s.Rates().Attr())
	return nil
}

// decodeRates sets the rates that one JSON object names.
func decodeRates(d *json.Decoder, rates *Rates) error {
	err := d.Decode(rates)
	if wrong := (*json.UnmarshalTypeError)(nil); errors.As(err, &wrong) && wrong.Field != "" {
		return fmt.Errorf(`limits: %s is a %s, want a text like "25Mbit/s", "10MiB/s" or "0"`, wrong.Field, wrong.Value)
	}
	if err != nil {
		return fmt.Errorf("limits: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("limits: want one JSON object, more follows it")
	}
	return nil
}

func (s *Swarm) sendRates(w http.ResponseWriter) {
	transport.ServeJSON(w, http.StatusOK, s.Rates())
}
